"""How fast are rollouts, without and with drafts, next to what people use today?"""
