"""The engine's server: ComfyUI's HTTP and WebSocket protocol over one render process. It never loads torch."""
