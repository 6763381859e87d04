"""Augmentation: (Sample batch, generator, (height, width)) -> Sample batch of that size, its flow still exact.

Every sample of a batch is changed in its own way; all chance comes from the generator, a CPU one, and the batch may lie
on any device. A family is one file, with a function for each kind of data it was published for:

flownet       FlowNet and PWC-Net: affine transforms of both frames and of the second alone
irr           IRR-PWC, and so FastFlowNet: the same with other ranges; KITTI
liteflownet2  LiteFlowNet2 as mmflow trains it: Chairs and Things, Sintel, KITTI
lightflow     Light Flow: shifts, turns, flips
raft          RAFT, GMA, DEQ-Flow: scale, stretch, colors of both frames apart, erased boxes; sparse truth
own           ours, for pairs of any kind: crop, mirror, color

`geometry` moves samples, `color` paints them.
"""
