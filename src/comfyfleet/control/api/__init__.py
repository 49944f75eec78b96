"""The control plane's routes: parse, call, render."""
