"""Files that are whole or not there, that are what was written, and that one program writes at a time."""
