"""Cost of a network: parameters, multiply-adds, memory, speed and receptive field.

`cost.*`, `memory.*` and `receptive_field.*` are exact: counted, mostly on PyTorch's meta device, without computing.
`speed.*` is measured and noisy. A multiply-add (MAC) is one multiplication and one addition: GFLOPs = 2 GMACs.
"""
