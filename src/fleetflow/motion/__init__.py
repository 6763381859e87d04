"""What people do with a flow: warping, consistency, occlusion."""
