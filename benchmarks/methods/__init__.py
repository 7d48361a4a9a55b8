"""What the catalog names: `function(inputs, topk) -> call`, `call(*tensors) -> scalar loss`.

The tensors are those of the family: logits: (student logits,); head: (hidden, weight); dense:
(student logits, teacher logits); dense_head: (hidden, weight, teacher hidden, teacher weight).
Building may allocate and import; only the call and its backward are measured.
"""
