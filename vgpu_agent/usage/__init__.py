"""What each container uses of the cards, by the processes that run on them."""
