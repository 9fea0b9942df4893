"""The open loop: each request at its moment, whatever the server does; measured and proved."""
