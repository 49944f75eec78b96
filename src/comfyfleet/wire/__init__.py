"""Every type that crosses a process boundary. No I/O, and no behaviour beyond validation.

Reading order: errors, workflow, generation (the wrapper's request and answer), jobs (durable jobs and their states),
routing (/route/ and auth_data), tickets (our signed ticket), workers (reports).
"""
