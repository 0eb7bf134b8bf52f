"""The only package code that imports Ray: the session, placement, the actors and the pool over them."""
