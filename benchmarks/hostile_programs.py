"""Programs that a verifier must survive.

{canary} is a file that must not be made, {secret} one that must not be read.
"""

DETACHED = """
import os, time
for _ in range(20):
    if not os.fork():
        os.setsid()
        if not os.fork():
            time.sleep(1000)
        os._exit(0)
"""
HOSTILE = {
    "never ends": "while True: pass",
    "sleeps": "import time\ntime.sleep(1000)",
    "prints without end": "while True: print('x' * 10000)",
    "forks without end": "import os\nwhile True: os.fork()",
    "forks behind Python": "import ctypes\nwhile True: ctypes.CDLL(None).fork()",
    "detaches": DETACHED,
    "kills everybody": "import os\nos.kill(-1, 9)",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "starts a program": "import subprocess\nsubprocess.run(['touch', '{canary}'])",
    "writes": "open('{canary}', 'w').write('x' * 10**10)",
    "reads": "print(open('{secret}').read())",
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', 9))",
    "no memory": "x = [bytearray(10**9) for _ in range(100)]",
    "too deep": "def f(): return f()\nf()",
    "closes what it has": "import os\nos.closerange(0, 1000)",
    "a signal": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    "reads the environment": "import os\nprint(os.environ['HOME'])",
}
