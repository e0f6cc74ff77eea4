"""The Python client of a Hostler gateway.

from hostler import Client

client = Client("http://127.0.0.1:9997")
uid = client.launch("qwen3", wait=False)
for step in client.launch_progress(uid):
    print(f"{step.stage} {step.progress:.0%}")
print(client.chat(uid, [{"role": "user", "content": "Hello!"}]))
"""

from gateway.async_client import AsyncClient
from gateway.calls import ClientError, Step
from gateway.client import Client

__all__ = ["AsyncClient", "Client", "ClientError", "Step"]
