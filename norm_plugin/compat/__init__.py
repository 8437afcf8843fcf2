"""The ops under the names of other projects: a module for each project, with its function and argument names."""
