"""The REST front end: `front` on `protocol`. `body` receives a request's body, `json_bodies` decodes it by `codec` and
encodes the reply, large ones in a process of its own (`json_link`, `json_process`)."""
