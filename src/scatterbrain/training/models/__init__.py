"""Models beside the decoder: vision transformers and BigGAN's attention block, each with exchangeable attention."""
