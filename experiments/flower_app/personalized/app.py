"""What ``flwr run`` and SuperNodes load; its settings stand in ``pyproject.toml``."""

from fedpers.flower_app import client_app, server_app

server = server_app()
client = client_app()
