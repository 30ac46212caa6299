"""Views for people: on a terminal, and on a page of HTML."""
