"""The control plane: endpoints, workergroups, tickets, durable jobs, the autoscaler and the fleet."""
