"""The wrapper's HTTP: parse, call `JobService`, render. `app` builds it; `generate` is the hot path."""
