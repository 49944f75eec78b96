"""The control plane's routes: parse, call, render. `calling` is what all share; the rest is one file a subject."""
