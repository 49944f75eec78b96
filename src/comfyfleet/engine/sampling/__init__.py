"""From noise to a latent: schedules of noise levels, samplers, guidance, and the run that joins them.

Reading order: schedules (which noise levels), noise (what randomness), guidance (how prompts steer), samplers/ (one
function per algorithm), sample (the whole run). Nothing here knows a network's insides or a node's inputs.
"""
