"""What a worker needs on disk: templates, model downloads, ComfyUI itself, and cleaning up."""
