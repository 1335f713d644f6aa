"""What scripts share at the terminal: options, output, how they end."""
