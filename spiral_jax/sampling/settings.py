"""temp"""
def check_sampling(c):
    pass
