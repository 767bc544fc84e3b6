def write_quick(*a): pass
def write(*a): pass
