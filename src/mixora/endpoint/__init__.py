"""An HTTP endpoint in OpenAI's manner over a roster of adapters; needs the optional extra `serve`."""
