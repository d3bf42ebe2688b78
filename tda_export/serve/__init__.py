"""OpenAI's chat and completions API over one artifact. Needs the extra `serve`: FastAPI, uvicorn, prometheus_client."""
