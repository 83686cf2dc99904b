"""PairVAE: two variational autoencoders, of scattering patterns and of micrographs, with one latent space."""
