"""Parts of the tasks' networks, their losses and their searches."""
