"""What differs by device, found by trial at loading: masked.py on a GPU, products of the CPU in the other files."""
