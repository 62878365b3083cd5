"""What a network costs: parameters, multiply-adds, memory, speed, and how far information travels in it.

`cost.*`, `memory.*` and `receptive_field.*` are exact: counted, as far as possible on PyTorch's meta device, which
computes nothing. `speed.*` is measured and noisy. A multiply-add (MAC) is one multiplication and one addition, so
GFLOPs = 2 GMACs.
"""
