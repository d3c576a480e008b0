"""A loaded model behind an HTTP endpoint in the shape of OpenAI's: on one machine, for its user's own tools.

`asked` reads requests, `speaker` runs them one after the other, `answers` says what comes back, `app` joins them.
"""
