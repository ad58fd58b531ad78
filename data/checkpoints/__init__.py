"""Everything that is a model on disk.

    families   config.json and weight names of GPT-2, Llama, Qwen; a new family changes this file
    weights    tensors in safetensors, all of them checked
    path       a diffusion path: path.json and its tensors
    state      a training, to be resumed
    hub        downloads, checked and resumed

May import system.
"""
