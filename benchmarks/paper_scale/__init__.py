"""The paper's deep autoencoder at its own size, in pieces: every method from one start, over the same seconds.

Read in this order: `settings` (sizes and budgets), `task` (the network, the images, what is measured), `first_order`,
`full_batch` and `newton` (the methods), `pieces` (what runs them piece by piece), `results`, `roofline`, `report`.
"""
