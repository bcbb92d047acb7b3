"""Images and labels: readers, where they are found, and which replica sees which."""
