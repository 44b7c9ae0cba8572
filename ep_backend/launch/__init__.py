"""Starting processes and ending them: groups of ranks, and servers with all that they start."""
