"""What a job passes through besides the engine: inputs in, outputs out, the world told.

Reading order: `fetch_inputs` (URLs to files in the engine's input folder), `history_files` (pure: what a history entry
names), `media` (what a file is, poster, peaks), `store_outputs` (files to links), `notify` (webhooks), `kit` (builds
all of them from settings). No stage knows the queue, the journal or the engine's protocol; each takes values and
returns values.
"""
