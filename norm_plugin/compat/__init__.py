"""Other people's calls on our ops: one module for each project, with that project's names and argument names."""
