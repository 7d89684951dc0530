"""What engines do with blocks, one verb each: match, put, and the bytes between."""
