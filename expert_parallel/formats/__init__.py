"""Files that other engines write: routing traces, counts, placements; recognised by what is in them."""
