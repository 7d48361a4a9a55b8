"""How the controller and the learner talk: a mailbox of JSON commands and step batches as safetensors files."""
