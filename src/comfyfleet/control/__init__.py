"""The control plane: endpoints, tickets, durable jobs, scaling.

Reading order: records (what is remembered), catalog (endpoints in memory), keys and auth, store/ (SQL), jobs (durable
jobs as values), admission, dispatcher, held_leases and leases; workers, router, route_queue, tickets (routing),
autoscaler, reconciler and fleet/ (workers' life); api/ (HTTP), app (puts it together).
"""
