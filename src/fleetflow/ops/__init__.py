"""The definitions of the flow operators in plain torch; `ops.kernels` holds fast versions of the same names."""
