"""``python -m fedpers`` is the ``fedpers`` command."""

from fedpers.app import main

main()
