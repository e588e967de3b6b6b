"""Sweeps: many runs by one command, recorded as a whole so that one which was stopped goes on.

``launch.py`` stands between Hydra's sweeper, which says what the jobs are, and its launcher, which starts them;
``record.py`` is what a sweep's folder holds, ``jobs.py`` one job, ``names.py`` what it is called, ``display.py`` what
is shown meanwhile, ``tuning.py`` the choice of settings on validation, ``plugins.py`` Hydra's plugins.
"""
