"""What `norm-plugin report` shows of the processes that have written a report."""
