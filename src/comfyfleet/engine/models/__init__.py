"""Model code: files in, networks out. Written from the papers and formulas, with the published files' own tensor names.

Reading order: checkpoint (what is in a file), families (which model it is), layers (weights as stored, computed in
another dtype), residency (where weights live), then one file per network: wan, wan_vae, umt5, sd15, sd15_vae,
clip_text; lora changes weights, prompt_weights reads `(text:1.2)`.
"""
