"""`saekit report`: what was learned, on one page of HTML that needs no network."""
