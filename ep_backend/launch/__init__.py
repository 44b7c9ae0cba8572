"""Starting rank processes and ending them: what commands that need a group have in common."""
