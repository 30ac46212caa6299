"""What people are shown: on a terminal, and on a page of HTML."""
