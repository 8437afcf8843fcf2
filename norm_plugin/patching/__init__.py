"""Source patches for engines that people build themselves: find, check, apply, and take back to the byte."""
