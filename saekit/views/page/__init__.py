"""`saekit report`: what was learned, on one page of HTML that needs no network.

Internal: may change in any release; the API is what `saekit` names.
"""
