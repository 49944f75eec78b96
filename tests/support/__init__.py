"""What several tests need to start real parts: a control plane, the real `vastai` client in its own environment."""
