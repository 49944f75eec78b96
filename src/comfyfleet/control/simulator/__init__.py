"""Play a trace through the router and the autoscaler in virtual time: the same functions, no sockets, no waiting."""
